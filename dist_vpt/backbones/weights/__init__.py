"""Weight files: the published ones, their layouts, loading and inspecting them."""
