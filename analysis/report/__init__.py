"""The report page: key figures, diagnosis, conclusions."""
