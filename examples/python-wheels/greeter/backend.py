"""A build back end in twenty lines, so that the example needs nothing but pip itself."""
import base64
import hashlib
import zipfile

NAME = "greeter-1.0-py3-none-any.whl"


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    files = {
        "greeter.py": open("greeter.py").read(),
        "greeter-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: greeter\nVersion: 1.0\n",
        "greeter-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: example\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = []
    with zipfile.ZipFile(f"{wheel_directory}/{NAME}", "w") as wheel:
        for path, text in files.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
            lines.append(f"{path},sha256={digest},{len(text.encode())}")
            wheel.writestr(zipfile.ZipInfo(path), text)
        lines.append("greeter-1.0.dist-info/RECORD,,")
        wheel.writestr(zipfile.ZipInfo("greeter-1.0.dist-info/RECORD"), "\n".join(lines) + "\n")
    return NAME
