"""`laptop`: SD 1.5 on a CPU, the product's engines beside what people draw with on laptops."""
