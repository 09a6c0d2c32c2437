"""What a layout of MiniMax-M2 costs and whether it works, before 230 GB of weights are loaded.

Read in this order:
    shape.py       the model: its sizes, and how its weights are quantised
    hardware.py    the GPUs: memory, bandwidths, and where each figure is from
    layout.py      the flags a person would give the server, and the rules they must keep
    memory.py      bytes a GPU: weights by kind, the engine's reserve, KV cache
    paths.py       which paths the model takes under a layout, and the command of every node
    step.py        a model of one decode step, and the layouts of some hardware ranked by it
    report.py      all of that about one layout, as plain data
    rendering.py   the screen

Nothing here imports torch or the engine, and rich is imported only where something is rendered. How heads, experts
and layers are divided is asked of :mod:`sglang_minimax.sharding`: the arithmetic that the model itself uses.
"""
