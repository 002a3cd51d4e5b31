"""The recipe: its schema, and loading it from YAML files and a.b=c overrides."""
