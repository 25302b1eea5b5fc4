"""Hot operations: each a reference in plain PyTorch behind one public function, the seam for a fused kernel."""
