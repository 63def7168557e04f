"""One file for each library whose models can run on the fused kernel. Import the file of the one you use."""
