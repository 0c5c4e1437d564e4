"""Distillation on code that runs anywhere: a drawn world, a teacher, and its LCM student."""
