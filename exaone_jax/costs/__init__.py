"""What a step costs: its FLOPs, the bytes of its program, and what chips have to give."""
