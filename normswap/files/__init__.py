"""The story for files: find the model in one, convert, inspect, load and save it. `convert_file` is where it begins."""
