"""How fast Fourstep is: commands that measure it, and simulate its policy."""
