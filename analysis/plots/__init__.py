"""Every figure. Only modules here import matplotlib and seaborn."""
