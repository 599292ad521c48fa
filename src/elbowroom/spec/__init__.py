"""From a YAML document to an experiment, and the files of a run folder."""
