"""What is wrong, and where: layers that err, machines that can't, inputs for Polygraphy."""
