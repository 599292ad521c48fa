"""The measures of an audit for each datum: evidence, gaps, distances, missed modes."""
