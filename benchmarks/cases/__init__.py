"""What is measured: each case sets its data up once and gives time, bytes and error from it."""
