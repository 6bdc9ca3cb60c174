"""What `overdrive bench` measures, and how. It knows nothing of the command line; the library never imports it."""
