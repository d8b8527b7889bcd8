"""What other packages would add, one file each: tests save, resume, cut, share and refuse them."""
