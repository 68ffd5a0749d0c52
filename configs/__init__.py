"""One TOML file for each model that can be served by name."""
