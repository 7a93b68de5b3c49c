"""Makes an INT8 or INT4 bundle from a floating-point bundle (the original bundle), calibrated on pictures.

``pipeline`` calls the steps in order: ``batches`` records the inputs of each graph, ``activations`` chooses INT8 ranges
(``choose_ranges``) and writes QuantizeLinear and DequantizeLinear nodes, ``weights`` rounds weights in blocks (GPTQ),
``agreement`` compares the outputs and the captions with those of the original bundle, ``search`` keeps sensitive layers
in floating point, and ``report`` writes the reports.
"""
