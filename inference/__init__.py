"""How it is computed: the seam (`target`), the fit, and every way to a posterior or an evidence."""
