"""MiniMax-M2 models served right by SGLang: an overlay over the installed engine."""

__version__ = "0.1.0"
