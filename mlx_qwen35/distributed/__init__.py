"""One model over several machines: rank 0 is the program, the other ranks follow its orders."""
