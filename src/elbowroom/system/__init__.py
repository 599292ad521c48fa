"""Files, archives, memory, time measurement: code that does not depend on models."""
