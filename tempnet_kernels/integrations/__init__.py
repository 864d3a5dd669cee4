"""One module per framework, which imports that framework; nothing else of the package does."""
