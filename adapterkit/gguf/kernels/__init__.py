"""Weight encoders, written once over *lanes*: sixteen blocks in a compiled SIMD register, or a torch tensor of many."""
