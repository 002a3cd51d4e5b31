"""The states of an image's tokens block by block, computed without autograd, live or from a cache."""
