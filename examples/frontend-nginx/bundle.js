const fs = require("fs");
fs.mkdirSync("dist", { recursive: true });
const page = fs.readFileSync("src/index.html", "utf8").replace("@VERSION@", process.env.VERSION);
fs.writeFileSync("dist/index.html", page);
fs.copyFileSync("src/style.css", "dist/style.css");
