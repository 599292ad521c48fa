"""Files, archives, memory, times: nothing here knows of models."""
