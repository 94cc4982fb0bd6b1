"""What commands do, without the command line: diagnose, predict, export, plot, report on gradients and memory."""
