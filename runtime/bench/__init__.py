"""Measures a bundle on this machine (``bench``), and checks what the machine can run (``doctor``)."""
