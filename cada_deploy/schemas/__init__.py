"""JSON Schemas of every JSON file that a run writes; the tests hold the files to them."""
