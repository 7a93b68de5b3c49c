"""Explains the bridge of a bundle: which patches each query attends to, how alike the queries are, Flamingo's gates.

``pipeline`` runs the graphs: ``attention`` finds the attention weights in a graph and makes them outputs, ``grid`` maps
patches back to the picture, ``queries`` compares the visual tokens, ``gates`` reads the gates of a decoder,
``drawing`` draws the pictures, and ``page`` writes the HTML page.
"""
