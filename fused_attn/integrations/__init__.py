"""Each module here belongs to one library whose models can run on the fused kernel. Import the module that you need."""
