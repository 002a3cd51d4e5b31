"""A small vision transformer that ships with the package, and the script that pretrained it."""
