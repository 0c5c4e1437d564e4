"""LoRAs before any engine: their files, whether they fit, and their sum with built weights."""
