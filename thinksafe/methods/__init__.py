"""The methods: ways to restore the safety of a model. One module each; base.py says what a method is."""
