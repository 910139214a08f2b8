// Stands for a bundler: every source file becomes one of the distribution, with its comments gone.
const fs = require("fs");
fs.mkdirSync("dist", { recursive: true });
for (const name of fs.readdirSync("src")) {
  const text = fs.readFileSync(`src/${name}`, "utf8").split("\n").filter((line) => !line.trim().startsWith("//"));
  fs.writeFileSync(`dist/${name}`, text.join("\n"));
}
