"""ThinkSafe: restore the safety of reasoning models with their own data (arXiv 2601.23143)."""

__version__ = "0.1.0"
