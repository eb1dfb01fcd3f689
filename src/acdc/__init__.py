"""acdc: train one network, get two: a sparse model and its dense twin."""
