"""The recipe: its schema, and loading it from shipped recipes, YAML files and a.b=c overrides."""
