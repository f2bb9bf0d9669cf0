"""Console, tables, files written whole, the resume cache, fingerprints: what every room uses."""
