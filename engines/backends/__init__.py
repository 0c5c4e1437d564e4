"""What runs a part: one module a backend behind `Engine`, which of them draws, and its LoRAs."""
