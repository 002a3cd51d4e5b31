"""The weights of a small vision transformer that ships with the package; tools/pretrain_demo.py pretrained it."""
