"""What an audit measures of each datum: evidence, gaps, distances, missed modes."""
