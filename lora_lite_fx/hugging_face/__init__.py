"""`adapt`: Hugging Face models whose forward runs rewritten graphs."""
