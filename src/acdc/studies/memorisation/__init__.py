"""Memorisation of random labels through the phases of a run."""
