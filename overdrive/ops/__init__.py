"""Every op: its schema, its plain-PyTorch reference (also the CPU implementation), its kernel and its fake."""
