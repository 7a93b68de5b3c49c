"""Rewrites graphs for one backend; each kind of rewrite (pass) is in a module of its own."""
