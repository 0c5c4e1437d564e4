"""Distillation on code that runs anywhere: a drawn picture world, a teacher, and its LCM student."""
