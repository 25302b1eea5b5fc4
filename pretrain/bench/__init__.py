"""What operations and training steps cost, here and beside others: `farspan bench kernels`, `farspan bench train`."""
