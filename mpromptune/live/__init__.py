"""The live view: how far a search has got, and where that is shown."""
