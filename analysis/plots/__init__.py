"""All figures. Only modules here import matplotlib and seaborn."""
