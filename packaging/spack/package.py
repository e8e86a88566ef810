# Unpublished. Checked: the file is valid Python, its version is setup.py's, and its requirements are those of the wheel.
# No Spack ran here. py-dpctl and py-dpnp may not be in Spack's own repository: a site then gives them as external packages.

from spack.package import *


class PyUlyssesDp(PythonPackage):
    """Ulysses sequence-parallel attention for dpnp, dpctl and NumPy arrays over MPI, on SYCL devices."""

    # an sdist with compiled kernels, as `make dist` builds it, in a mirror or beside this file
    url = "file:///path/of/ulysses_dp-0.1.0.tar.gz"

    license("Apache-2.0")

    version("0.1.0", sha256="0000000000000000000000000000000000000000000000000000000000000000")  # of your own sdist

    depends_on("python@3.10:", type=("build", "run"))
    depends_on("py-setuptools@77:", type="build")
    depends_on("py-dpctl@0.21:", type=("build", "run"))
    depends_on("py-dpnp@0.19:", type=("build", "run"))
    depends_on("py-mpi4py@4:", type=("build", "run"))
    depends_on("py-numpy", type=("build", "run"))
    depends_on("mpi", type="run")
